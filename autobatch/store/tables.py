"""The tables of measurements. Times are seconds since 1970 in UTC by the database's own clock; texts named `…_json` hold JSON."""

from __future__ import annotations

from sqlalchemy import Boolean, Column, Double, Index, Integer, MetaData, String, Table, Text

__all__ = ["NAMING", "generation", "measurement", "metadata", "oom_report"]

NAMING = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
"""How indexes and constraints are named, so that each has the same name in every database."""

metadata = MetaData(naming_convention=NAMING)
_Time: Double[float] = Double()

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
    # What a cache finds it by: hashes of the job, and of the job on its card with its versions; the files behind the job.
    Column("job", String(64)),
    Column("series", String(64)),
    Column("sources_json", Text),
    Index("ix_measurement_workload_gpu", "workload", "gpu"),
    Index("ix_measurement_job", "job"),
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

# One row, raised whenever an answer may have changed: what is held in memory is good for one number.
generation = Table(
    "generation",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("number", Integer, nullable=False),
)
