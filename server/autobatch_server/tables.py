"""The tables. Times are seconds since 1970 in UTC by the database's own clock; texts named `…_json` hold JSON."""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    text,
)

__all__ = [
    "event",
    "generation",
    "idempotency",
    "measurement",
    "metadata",
    "oom_report",
    "probe",
    "runner",
    "session",
    "token",
]

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)
_Time: Double[float] = Double()

probe = Table(
    "probe",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("workload", Text, nullable=False),
    Column("gpu", String(128), nullable=False),
    Column("basis", String(16), nullable=False),
    Column("options_json", Text, nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("started_at", _Time),
    Column("ended_at", _Time),
    Column("attempts", Integer, nullable=False, server_default="0"),
    # The number of the lease: each claim raises it, and what carries an older one is refused.
    Column("fence", Integer, nullable=False, server_default="0"),
    Column("owner", String(200)),
    Column("slot", String(200)),
    Column("lease_until", _Time),
    Column("cancel_requested", Boolean, nullable=False, server_default=text("false")),
    Column("token_id", String(40)),
    Column("measurement_id", String(40)),
    Column("problem_json", Text),
    Index("ix_probe_state_created_at", "state", "created_at"),
    # One probe per GPU at a time, by the database's own hand.
    Index(
        "uq_probe_slot_running",
        "slot",
        unique=True,
        sqlite_where=text("state = 'running'"),
        postgresql_where=text("state = 'running'"),
    ),
)

event = Table(
    "event",
    metadata,
    Column("probe_id", String(40), ForeignKey("probe.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("at", _Time, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("data_json", Text, nullable=False),
    PrimaryKeyConstraint("probe_id", "number"),
)

measurement = Table(
    "measurement",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("created_at", _Time, nullable=False),
    Column("workload", Text, nullable=False),
    Column("gpu", String(128), nullable=False),
    Column("basis", String(16), nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("source", String(16), nullable=False),
    Column("probe_id", String(40)),
    Column("token_id", String(40)),
    Column("report_json", Text, nullable=False),
    Index("ix_measurement_workload_gpu", "workload", "gpu"),
)

oom_report = Table(
    "oom_report",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("created_at", _Time, nullable=False),
    Column("workload", Text, nullable=False),
    Column("gpu", String(128), nullable=False),
    Column("micro_batch_size", Integer, nullable=False),
    Column("micro_batches_per_step", Integer, nullable=False),
    Column("after_plan", Boolean, nullable=False),
    Column("measurement_id", String(40)),
    Column("token_id", String(40)),
    Index("ix_oom_report_workload_gpu", "workload", "gpu"),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("principal", String(40), nullable=False),
    Column("key", String(255), nullable=False),
    Column("request_hash", String(64), nullable=False),
    Column("probe_id", String(40)),
    Column("measurement_id", String(40)),
    Column("created_at", _Time, nullable=False),
    PrimaryKeyConstraint("principal", "key"),
)

token = Table(
    "token",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("secret_hash", String(64), nullable=False),
    Column("scopes", Text, nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("expires_at", _Time),
    Column("revoked_at", _Time),
)

session = Table(
    "session",
    metadata,
    Column("id_hash", String(64), primary_key=True),
    Column("token_id", String(40), ForeignKey("token.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", _Time, nullable=False),
    Column("expires_at", _Time, nullable=False),
)

runner = Table(
    "runner",
    metadata,
    Column("id", String(200), primary_key=True),
    Column("host", String(128), nullable=False),
    Column("slots_json", Text, nullable=False),
    Column("seen_at", _Time, nullable=False),
)

# One row, raised whenever an answer may have changed: what is held in memory is good for one number.
generation = Table(
    "generation",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("number", Integer, nullable=False),
)
