"""The service's own tables. Times are seconds since 1970 in UTC by the database's clock; texts named `…_json` hold JSON."""

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

from autobatch.store import NAMING, STORE_SCHEMA, Schema

__all__ = [
    "SCHEMAS",
    "event",
    "idempotency",
    "metadata",
    "probe",
    "runner",
    "session",
    "token",
]

metadata = MetaData(naming_convention=NAMING)
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

SCHEMAS = (
    STORE_SCHEMA,
    Schema(
        metadata=metadata,
        versions="autobatch_server:migrations/versions",
        version_table="alembic_version",
        head="0001",
    ),
)
"""All tables of the service's database: those of measurements, and its own."""
