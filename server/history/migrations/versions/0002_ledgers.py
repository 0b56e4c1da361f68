"""Spends name their mechanism and their place in the site's ledger; ledgers are remembered over all runs.

Revision 0002, after 0001. Releases of 0001 were continuous Gaussians, or had no noise; what else a spend names
now was not recorded, and stays empty.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Not as a batch: that would copy the table, and make it one with row ids on SQLite.
    op.add_column("spends", sa.Column("mechanism", sa.String(), nullable=False, server_default="gaussian"))
    op.execute("UPDATE spends SET mechanism = 'none' WHERE noise_multiplier = 0")
    for name in ("noise_source", "gradients", "ledger_id", "ledger_head"):
        op.add_column("spends", sa.Column(name, sa.String(), nullable=False, server_default=""))
    op.add_column("spends", sa.Column("ledger_number", sa.Integer(), nullable=False, server_default="0"))
    op.create_table(
        "ledgers",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("dataset", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("simulated", sa.Boolean(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_ledgers_run_id"),
        sa.PrimaryKeyConstraint("id", name="pk_ledgers"),
    )
