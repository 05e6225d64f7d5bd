"""The service's settings: from its file, from `AUTOBATCH_SERVER_…` variables and from flags, the last winning."""

from __future__ import annotations

import difflib
import ipaddress
import os
import tomllib
from typing import TYPE_CHECKING, Annotated, cast

import platformdirs
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from autobatch import UsageError, find_card
from autobatch_server.workloads import WorkloadDeclaration, check_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__ = ["ENVIRONMENT_PREFIX", "Settings", "default_config_path", "load_settings"]

ENVIRONMENT_PREFIX = "AUTOBATCH_SERVER_"
_FILE = "_values_of_the_file"


def default_config_path() -> Path:
    """Where the operator's file is looked for when none is named."""
    return platformdirs.user_config_path("autobatch") / "server.toml"


def _default_database() -> str:
    return f"sqlite:///{platformdirs.user_data_path('autobatch') / 'server.sqlite3'}"


_Seconds = Annotated[float, Field(gt=0, le=30 * 86400)]


class Settings(BaseSettings):
    """Everything that an operator can set.

    Each field is a key of the file, and in capitals after `AUTOBATCH_SERVER_` an environment variable.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True, hide_input_in_errors=True
    )

    host: str = Field("127.0.0.1", description="address to listen on; any but a loopback one needs a token to exist")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    database_url: str = Field(
        default_factory=_default_database,
        description="where everything is kept: sqlite:///PATH or postgresql://USER@HOST/NAME",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="names under which the service is reached, besides loopback ones (in a variable: commas between)",
    )
    run_probes: bool = Field(True, description="whether this process runs probes as well as answering")
    serve_http: bool = Field(True, description="whether this process answers; false makes it a runner alone")
    emulated_slots: int = Field(1, ge=0, le=64, description="probes on emulated cards at once; 0 refuses them")
    real_gpus: bool = Field(True, description="whether this machine's own GPUs are probed")
    ray_address: str | None = Field(
        None,
        description="a Ray cluster whose nodes run the probes instead of this machine: auto, or HOST:PORT (extra `ray`)",
    )
    ray_emulate: bool = Field(False, description="whether Ray nodes emulate the card that they are said to have")
    default_gpu: str = Field(
        "A100-SXM4-40GB", description="card that a probe emulates where none is asked for and none is here"
    )
    cluster_gpus: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="cards that the Kubernetes cluster has, for the webhook; all where empty (in a variable: commas between)",
    )
    queue_limit: int = Field(100, ge=1, le=100_000, description="probes that may wait")
    queue_limit_per_token: int = Field(50, ge=1, le=100_000, description="probes of one token that may wait or run")
    streams_per_token: int = Field(
        20, ge=1, le=10_000, description="event streams and waiting polls of one token at once"
    )
    probe_deadline: _Seconds = Field(3600.0, description="seconds that a probe may run, unless it asks for less")
    trial_timeout: _Seconds = Field(600.0, description="seconds that one trial may take")
    child_memory_bytes: int = Field(
        16 * 1024**3, ge=256 * 1024**2, description="host memory that a probe's processes may use together"
    )
    child_environment: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="variables that training jobs see besides the usual ones (in a variable: commas between)"
    )
    lease: _Seconds = Field(15.0, ge=1.0, description="seconds without a sign of life after which a probe is run anew")
    max_attempts: int = Field(3, ge=1, le=100, description="runs after which a probe whose runner died is given up")
    fresh_for: _Seconds = Field(30 * 86400.0, description="seconds for which a measurement answers a new probe")
    keep_events: _Seconds = Field(30 * 86400.0, description="seconds for which the events of an ended probe are kept")
    body_limit_bytes: int = Field(1024**2, ge=1024, le=64 * 1024**2, description="largest request body")
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="least level that is logged")
    workloads: dict[str, WorkloadDeclaration] = Field(
        default_factory=dict,
        description="training jobs that may be asked for besides the built-in ones, as [workloads.NAME] tables of the file",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags before variables before the file, whose values `load_settings` hands over under `_FILE`."""
        del dotenv_settings, file_secret_settings
        init = cast("InitSettingsSource", init_settings)
        from_file = InitSettingsSource(settings_cls, init_kwargs=init.init_kwargs.pop(_FILE, {}))
        return (init_settings, env_settings, from_file)

    @field_validator("default_gpu")
    @classmethod
    def _check_card(cls, value: str) -> str:
        return find_card(value).name

    @field_validator("allowed_hosts", "child_environment", "cluster_gpus", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("cluster_gpus")
    @classmethod
    def _check_cards(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(find_card(name).name for name in value)

    @field_validator("workloads")
    @classmethod
    def _check_names(cls, value: dict[str, WorkloadDeclaration]) -> dict[str, WorkloadDeclaration]:
        check_names(value)
        return value

    @property
    def is_loopback(self) -> bool:
        """Whether nothing but this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False


def load_settings(path: Path | None = None, flags: Mapping[str, object] | None = None) -> Settings:
    """Read the settings.

    Args:
        path: the operator's TOML file; the usual place where None, which need not be there.
        flags: what the command line sets, by field name.

    Raises:
        UsageError: the file cannot be read, or a value is not as it should be; the message names the place.
    """
    _check_variables(os.environ)
    named = path is not None
    path = path or default_config_path()
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if named:
            raise UsageError(f"there is no file {path}: --config names the operator's TOML file") from None
        values = {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    flags = flags or {}
    try:
        return Settings(**{**flags, _FILE: values})  # type: ignore[arg-type] # validated by pydantic
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        # A key that is not known explains one that is missing: it stands in its place.
        first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
        setting = ".".join(map(str, first["loc"]))
        place = _place(str(first["loc"][0]) if first["loc"] else "", flags, path)
        raise UsageError(
            f"setting {setting}, {place}: {_what_is_wrong(first['type'], first['msg'], first['loc'])}"
        ) from None
    except SettingsError:  # a variable of a table, which takes JSON
        raise UsageError(f"variable {ENVIRONMENT_PREFIX}WORKLOADS is not JSON: write the tables into {path}") from None


def _place(name: str, flags: Mapping[str, object], path: Path) -> str:
    """Where the value came from that was taken."""
    if name in flags:
        return "of the command line"
    variable = f"{ENVIRONMENT_PREFIX}{name.upper()}"
    return f"of {variable}" if variable in {known.upper() for known in os.environ} else f"in {path}"


def _what_is_wrong(kind: str, message: str, place: tuple[int | str, ...]) -> str:
    if kind == "extra_forbidden" and place[0] == "workloads" and place[-1] == "command":
        return "workloads that are commands are not taken yet: name a factory, as module:factory or /path/to/file.py:factory"
    if kind == "extra_forbidden":
        known = Settings.model_fields if len(place) == 1 else ()
        return f"there is no such setting{_nearest(str(place[-1]), known)}"
    return message.removeprefix("Value error, ")


def _check_variables(environment: Mapping[str, str]) -> None:
    """Refuse a variable under our prefix that sets nothing: it was meant to."""
    for variable in sorted(environment):
        name = variable.upper().removeprefix(ENVIRONMENT_PREFIX).lower()
        if variable.upper().startswith(ENVIRONMENT_PREFIX) and name not in Settings.model_fields:
            raise UsageError(f"variable {variable} sets nothing{_nearest(name, Settings.model_fields)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {near[0]}?" if near else ": `autobatch serve --help` lists them all"
