"""Models of transformers and timm as training jobs: by configuration and by name, on an emulated card."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

import autobatch
from autobatch import UsageError, WorkloadName
from autobatch.cache.identity import workload_identity
from autobatch.cli import main

if TYPE_CHECKING:
    from pathlib import Path

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "max_position_embeddings": 4096,
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    },
    "bert": {
        "model_type": "bert",
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "vocab_size": 1000,
    },
    "t5": {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "num_layers": 2,
        "d_model": 128,
        "d_ff": 256,
        "num_heads": 2,
        "vocab_size": 1000,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    },
    "whisper": {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "encoder_layers": 1,
        "decoder_layers": 1,
        "d_model": 128,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 256,
        "decoder_ffn_dim": 256,
        "vocab_size": 1000,
        "max_source_positions": 100,
        "max_target_positions": 64,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "decoder_start_token_id": 1,
    },
    "vit": {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "image_size": 64,
    },
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configurations lie in the current folder; the hub is not asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, configuration in CONFIGURATIONS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(configuration))


def probed(workload: str, **options: Any) -> autobatch.Report:
    asked = {"target": 64, "max_micro_batch": 16, **options}
    return autobatch.probe_workload(workload, emulate="L4", **asked)


def peak(report: autobatch.Report, size: int = 16) -> int:
    return max(trial.footprint_bytes for trial in report.trials if trial.micro_batch_size == size)


@pytest.mark.parametrize(
    ("text", "target", "factory"),
    [
        ("hf:llama.json?seq_len=512", "hf", "llama.json"),
        ("hf:gpt2", "hf", "gpt2"),
        ("hf:owner/model?task=causal-lm", "hf", "owner/model"),
        ("timm:vit_tiny_patch16_224.augreg_in21k?image=384", "timm", "vit_tiny_patch16_224.augreg_in21k"),
    ],
)
def test_names_are_read_and_written(text: str, target: str, factory: str) -> None:
    """As they were given."""
    name = WorkloadName.parse(text)
    assert (name.target, name.factory, name.is_own) == (target, factory, False)
    assert WorkloadName.parse(str(name)) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf:missing.json", r"there is no configuration missing\.json in "),
        ("hf:llama.json?length=5", "unexpected keyword argument 'length'; it takes task, seq_len"),
        ("timm:resnet18?seq_len=5", "unexpected keyword argument 'seq_len'; it takes image, classes"),
        ("hg:llama.json", "is not of the form module:factory"),
        ("lama", "a model of transformers or timm is hf:CONFIG or timm:MODEL"),
    ],
)
def test_names_that_mean_nothing_are_refused_before_torch_is_there(text: str, message: str) -> None:
    """In one line."""
    with pytest.raises(UsageError, match=message):
        WorkloadName.parse(text)


def test_a_configuration_is_known_by_its_content_and_the_librarys_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache asks for the file; another version of transformers may build another model."""
    identity = workload_identity("hf:llama.json")
    assert [path.rpartition("/")[2] for path in identity.files] == ["llama.json"]
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.1")
    assert workload_identity("hf:llama.json").job != identity.job


@pytest.mark.slow
@pytest.mark.usefixtures("libraries")
def test_a_language_model_by_its_configuration() -> None:
    """Certified, and called by its name."""
    pytest.importorskip("transformers")
    report = probed("hf:llama.json?seq_len=512")
    assert (report.certified, report.workload, report.max_micro_batch_size) == (True, "hf:llama.json?seq_len=512", 16)


@pytest.mark.slow
@pytest.mark.usefixtures("libraries")
def test_longer_sequences_take_more_and_weights_in_half_the_bytes_less() -> None:
    """Than the same model's."""
    pytest.importorskip("transformers")
    report = probed("hf:llama.json?seq_len=512")
    longer = probed("hf:llama.json?seq_len=1024")
    assert peak(longer) > peak(report)
    assert peak(probed("hf:llama.json?seq_len=512&weights=bf16")) < peak(report)


@pytest.mark.slow
@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    "workload",
    [
        "hf:llama.json?seq_len=512&attention=eager",
        "hf:bert.json?task=masked-lm",
        "hf:bert.json?task=sequence-classification&classes=5",
        "hf:bert.json?task=token-classification",
        "hf:bert.json?task=question-answering&seq_len=384",
        "hf:t5.json?seq_len=64&target_len=32",
        "hf:whisper.json",
        "hf:vit.json?precision=fp16",
        "hf:vit.json?image=96",
        "timm:resnet18?image=96&classes=10",
        "timm:vit_tiny_patch16_224?image=96&precision=fp32",
    ],
)
def test_each_kind_of_model_trains(workload: str) -> None:
    """Certified, on every task."""
    pytest.importorskip("timm" if workload.startswith("timm:") else "transformers")
    report = probed(workload)
    assert (report.certified, report.max_micro_batch_size) == (True, 16)


@pytest.mark.slow
@pytest.mark.usefixtures("libraries")
def test_checkpointing_takes_less() -> None:
    """Activations are computed again in the backward."""
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    for workload in ("hf:llama.json?seq_len=1024", "timm:vit_tiny_patch16_224?classes=10"):
        assert peak(probed(f"{workload}&checkpointing=true")) < peak(probed(workload))


@pytest.mark.slow
@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    ("workload", "message"),
    [
        ("hf:bert.json", "hf:bert.json does not say what it is trained for: add ?task=, one of causal-lm"),
        ("hf:llama.json?seq_len=5000", "seq_len 5000 is above the 4096 positions of the model: give 4096 or less"),
        ("hf:llama.json?task=image-classification", "llama.json makes no model for image-classification"),
        ("hf:lama", "hf:lama is no configuration of transformers"),
        ("hf:llama.json?weights=int8", "weights 'int8' is unknown; choose fp32 or bf16"),
        ("timm:resnet180", "timm has no model 'resnet180': did you mean 'resnet18"),
    ],
)
def test_models_that_are_not_there_are_refused(workload: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 and one line, with the way out."""
    assert main(["probe", workload, "--target", "64", "--emulate", "L4"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
