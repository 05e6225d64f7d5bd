"""What a cache finds a measurement by."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.add_column("measurement", sa.Column("job", sa.String(length=64), nullable=True))
    op.add_column("measurement", sa.Column("series", sa.String(length=64), nullable=True))
    op.add_column("measurement", sa.Column("sources_json", sa.Text(), nullable=True))
    op.create_index("ix_measurement_job", "measurement", ["job"], unique=False)


def downgrade() -> None:
    """Go back from it."""
    op.drop_index("ix_measurement_job", table_name="measurement")
    op.drop_column("measurement", "sources_json")
    op.drop_column("measurement", "series")
    op.drop_column("measurement", "job")
