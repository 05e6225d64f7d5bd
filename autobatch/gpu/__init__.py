"""GPUs: what NVML says of them, the allocator's memory, which errors mean out of memory, and a catalogue of cards."""
