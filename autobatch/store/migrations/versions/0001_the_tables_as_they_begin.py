"""The tables as they begin."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    if sa.inspect(op.get_bind()).has_table("measurement"):
        return  # made by the service, before these tables had migrations of their own
    op.create_table(
        "generation",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_generation")),
    )
    op.execute(sa.text("INSERT INTO generation (id, number) VALUES (1, 0)"))
    op.create_table(
        "measurement",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("workload", sa.Text(), nullable=False),
        sa.Column("gpu", sa.String(length=128), nullable=False),
        sa.Column("basis", sa.String(length=16), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("source", sa.String(length=16), nullable=False),
        sa.Column("probe_id", sa.String(length=40), nullable=True),
        sa.Column("token_id", sa.String(length=40), nullable=True),
        sa.Column("report_json", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_measurement")),
    )
    op.create_index("ix_measurement_workload_gpu", "measurement", ["workload", "gpu"], unique=False)
    op.create_table(
        "oom_report",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("workload", sa.Text(), nullable=False),
        sa.Column("gpu", sa.String(length=128), nullable=False),
        sa.Column("micro_batch_size", sa.Integer(), nullable=False),
        sa.Column("micro_batches_per_step", sa.Integer(), nullable=False),
        sa.Column("after_plan", sa.Boolean(), nullable=False),
        sa.Column("measurement_id", sa.String(length=40), nullable=True),
        sa.Column("token_id", sa.String(length=40), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_oom_report")),
    )
    op.create_index("ix_oom_report_workload_gpu", "oom_report", ["workload", "gpu"], unique=False)


def downgrade() -> None:
    """Go back from it."""
    op.drop_index("ix_oom_report_workload_gpu", table_name="oom_report")
    op.drop_table("oom_report")
    op.drop_index("ix_measurement_workload_gpu", table_name="measurement")
    op.drop_table("measurement")
    op.drop_table("generation")
