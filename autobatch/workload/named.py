"""Training jobs of models that other libraries build by a name or a configuration: `hf:` and `timm:`.

Weights and data are random, and no weight is downloaded: memory does not depend on their values.
"""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from autobatch.errors import UsageError
from autobatch.workload.builtin import Precision, job_of, positive
from autobatch.workload.judging import first_line

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from autobatch.workload.job import TrainingJob

__all__ = ["NAMED_MODELS", "build_hf", "build_timm", "local_config"]

HfTask = Literal[
    "causal-lm",
    "masked-lm",
    "seq2seq-lm",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "image-classification",
    "speech-seq2seq",
]
_HF_CLASSES: dict[str, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
}
# How the architecture that a configuration names ends, where it was saved with a model.
_HF_ENDINGS = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
}
_LONGEST_UNASKED = 1024


def build_hf(  # noqa: PLR0913 - each is a choice of the user's
    config: str,
    *,
    task: HfTask | Literal[""] = "",
    seq_len: int = 0,
    target_len: int = 0,
    image: int = 0,
    classes: int = 0,
    precision: Precision = "bf16",
    weights: Literal["fp32", "bf16"] = "fp32",
    checkpointing: bool = False,
    attention: str = "",
) -> TrainingJob:
    """Train a model of transformers made from its configuration, with AdamW, on sequences of full length without padding.

    Args:
        config: a `config.json`, or a folder with one; a model type such as `gpt2` or `llama`, in its default configuration; or
            the name of a repository of the Hugging Face hub, of which the configuration alone is read.
        task: what it is trained for; the one that the configuration's architecture names where empty.
        seq_len: tokens of each sequence; 0 for the most that the model takes, up to 1,024.
        target_len: tokens of what a sequence-to-sequence model writes; 0 for as many as it reads, or the most that it takes.
        image: side of each image in pixels; 0 for the configuration's.
        classes: labels of a classifier; 0 for the configuration's.
        precision: of autocast.
        weights: of the parameters, and so of gradients and the optimizer's state.
        checkpointing: whether activations are computed again in the backward.
        attention: the implementation, as `attn_implementation`; empty for the library's choice.

    Raises:
        UsageError: transformers is not installed, there is no such configuration, or a parameter does not suit it.
    """
    transformers = _import("transformers", "the workload hf:")
    import torch

    found = _hf_config(transformers, config)
    chosen = task or _task_of(found, config)
    if chosen not in _HF_CLASSES:
        raise UsageError(f"task {chosen!r} is unknown; choose {', '.join(get_args(HfTask))}")
    for name, value in (("seq_len", seq_len), ("target_len", target_len), ("image", image), ("classes", classes)):
        if value:
            positive(**{name: value})
    _check_choices(weights=(weights, ("fp32", "bf16")), checkpointing=(checkpointing, (False, True)))
    _set_in_config(found, classes=classes, image=image, checkpointing=checkpointing)
    more: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    try:
        with torch.device("cuda"):
            model = getattr(transformers, _HF_CLASSES[chosen]).from_config(found, dtype=dtype, **more)
    except (ValueError, ImportError) as error:
        raise UsageError(f"{config} makes no model for {chosen}: {first_line(error)}") from None
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = _hf_inputs(found, chosen, seq_len=seq_len, target_len=target_len, image=image, dtype=dtype)

    def loss_of(n: int) -> torch.Tensor:
        loss: torch.Tensor = model(**inputs(n)).loss
        return loss

    return job_of(loss_of, torch.optim.AdamW(model.parameters(), lr=1e-4), precision)


def build_timm(
    model: str,
    *,
    image: int = 0,
    classes: int = 1000,
    precision: Precision = "bf16",
    checkpointing: bool = False,
    channels_last: bool = True,
) -> TrainingJob:
    """Train an image classifier of timm by its name, with AdamW.

    Args:
        model: as `timm.list_models()` has it.
        image: side of each image in pixels; 0 for the model's own.
        classes: labels.
        precision: of autocast.
        checkpointing: whether activations are computed again in the backward.
        channels_last: the layout of images and weights.

    Raises:
        UsageError: timm is not installed, it has no such model, or the model takes no such images.
    """
    timm = _import("timm", "the workload timm:")
    import torch

    known = timm.list_models()
    if model.partition(".")[0] not in known:
        near = difflib.get_close_matches(model, known, n=1)
        raise UsageError(f"timm has no model {model!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    positive(classes=classes)
    _check_choices(checkpointing=(checkpointing, (False, True)), channels_last=(channels_last, (False, True)))
    if image:
        positive(image=image)
    with torch.device("cuda"):
        network = _timm_network(timm, model, image, classes)
    side = image or int(network.pretrained_cfg["input_size"][-1])
    channels = int(network.pretrained_cfg["input_size"][0])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network.to(memory_format=layout).train()
    if checkpointing:
        network.set_grad_checkpointing()

    def loss_of(n: int) -> torch.Tensor:
        images = torch.randn(n, channels, side, side, device="cuda").contiguous(memory_format=layout)
        labels = torch.randint(0, classes, (n,), device="cuda")
        return torch.nn.functional.cross_entropy(network(images), labels)

    return job_of(loss_of, torch.optim.AdamW(network.parameters(), lr=1e-4), precision)


NAMED_MODELS: dict[str, Callable[..., TrainingJob]] = {"hf": build_hf, "timm": build_timm}
"""What stands before the colon of a workload, and what makes the job of what stands behind it."""


def local_config(name: str) -> Path | None:
    """The file of a configuration that is named by its path; None where the name is none.

    Raises:
        UsageError: it is a path, and there is nothing there.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    elif not name.endswith(".json"):
        return None
    if not path.is_file():
        raise UsageError(f"there is no configuration {path} in {Path.cwd()}")
    return path


def _check_choices(**given: tuple[object, tuple[object, ...]]) -> None:
    for name, (value, choices) in given.items():
        if value not in choices:
            spelled = " or ".join(str(choice).lower() for choice in choices)
            raise UsageError(f"{name} {value!r} is unknown; choose {spelled}")


def _import(module: str, what: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(
            f"{what} needs {module}, which is not installed: pip install '.[{module}]' in autobatch's own folder"
        ) from None


def _hf_config(transformers: Any, name: str) -> Any:
    """A configuration by its file, its type or its repository."""
    path = local_config(name)
    if path is None and name in transformers.CONFIG_MAPPING:
        return transformers.CONFIG_MAPPING[name]()
    try:
        return transformers.AutoConfig.from_pretrained(str(path or name))
    except (OSError, ValueError, KeyError) as error:
        near = difflib.get_close_matches(name, list(transformers.CONFIG_MAPPING), n=1) if path is None else []
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else "name a config.json, a folder with one, or a repository of the hub"
        )
        raise UsageError(f"hf:{name} is no configuration of transformers ({first_line(error)}): {hint}") from None


def _set_in_config(config: Any, *, classes: int, image: int, checkpointing: bool) -> None:
    """Set what the model is built by."""
    if classes:
        config.num_labels = classes
    if image and hasattr(config, "image_size"):
        config.image_size = image  # how many patches there are depends on it
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None and hasattr(text, "vocab_size"):
        text.pad_token_id = 0  # a classifier finds the end of a sequence by it
    if checkpointing:
        config.use_cache = False


def _task_of(config: Any, name: str) -> str:
    """The task that the configuration's architecture is for."""
    for architecture in getattr(config, "architectures", None) or []:
        for ending, task in _HF_ENDINGS.items():
            if architecture.endswith(ending):
                return task
        if architecture.endswith("ForConditionalGeneration") and config.is_encoder_decoder:
            return "speech-seq2seq" if hasattr(config, "num_mel_bins") else "seq2seq-lm"
    raise UsageError(f"hf:{name} does not say what it is trained for: add ?task=, one of {', '.join(get_args(HfTask))}")


def _hf_inputs(
    config: Any, task: str, *, seq_len: int, target_len: int, image: int, dtype: torch.dtype
) -> Callable[[int], dict[str, torch.Tensor]]:
    """What makes a batch of n samples for a task."""
    import torch

    def draw(low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high, shape, device="cuda")

    if task == "image-classification":
        own = config.image_size
        side = image or (own if isinstance(own, int) else own[0])

        def images(n: int) -> dict[str, torch.Tensor]:
            pixels = torch.randn(n, config.num_channels, side, side, device="cuda", dtype=dtype)
            return {"pixel_values": pixels, "labels": draw(0, config.num_labels, (n,))}

        return images
    vocabulary = config.get_text_config().vocab_size
    if task == "speech-seq2seq":
        written = _length("target_len", target_len, getattr(config, "max_target_positions", None))

        def speech(n: int) -> dict[str, torch.Tensor]:
            shape = (n, config.num_mel_bins, 2 * config.max_source_positions)
            features = torch.randn(shape, device="cuda", dtype=dtype)
            return {"input_features": features, "labels": draw(0, vocabulary, (n, written))}

        return speech
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = _length("seq_len", seq_len, most if isinstance(most, int) and most > 0 else None)
    shapes: dict[str, Callable[[int], dict[str, torch.Tensor]]] = {
        "sequence-classification": lambda n: {"labels": draw(0, config.num_labels, (n,))},
        "token-classification": lambda n: {"labels": draw(0, config.num_labels, (n, length))},
        "question-answering": lambda n: {key: draw(0, length, (n,)) for key in ("start_positions", "end_positions")},
        "seq2seq-lm": lambda n: {"labels": draw(0, vocabulary, (n, target_len or length))},
    }

    def tokens(n: int) -> dict[str, torch.Tensor]:
        ids = draw(0, vocabulary, (n, length))
        more = shapes[task](n) if task in shapes else {"labels": ids}
        return {"input_ids": ids, **more}

    return tokens


def _length(name: str, asked: int, most: int | None) -> int:
    if most is not None and asked > most:
        raise UsageError(f"{name} {asked} is above the {most} positions of the model: give {most} or less")
    return asked or min(most or _LONGEST_UNASKED, _LONGEST_UNASKED)


def _timm_network(timm: Any, model: str, image: int, classes: int) -> Any:
    """The model; told the side of its images where it has to know it."""
    if image:
        with contextlib.suppress(TypeError):  # a convolutional model takes images of any side
            return timm.create_model(model, pretrained=False, num_classes=classes, img_size=image)
    return timm.create_model(model, pretrained=False, num_classes=classes)
