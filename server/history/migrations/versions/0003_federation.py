"""Runs that were submitted to a daemon, the sites' keys, and what a watcher of a run is told.

Revision 0003, after 0002. All earlier runs were simulated.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("origin", sa.String(), nullable=False, server_default="simulate"))
    op.add_column("runs", sa.Column("submitted_by", sa.String(), nullable=True))
    op.add_column("runs", sa.Column("stop_requested_at", sa.DateTime(timezone=True), nullable=True))
    op.create_table(
        "site_keys",
        sa.Column("public_key", sa.String(), nullable=False),
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("enrolled_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("node_id", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("public_key", name="pk_site_keys"),
    )
    # One live key a site.
    op.create_index(
        "uq_site_keys_live",
        "site_keys",
        ["site"],
        unique=True,
        sqlite_where=sa.text("revoked_at IS NULL"),
        postgresql_where=sa.text("revoked_at IS NULL"),
    )
    op.create_table(
        "progress",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("site", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("text", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_progress_run_id"),
        sa.PrimaryKeyConstraint("id", name="pk_progress"),
    )
    op.create_index("ix_progress_run_id_id", "progress", ["run_id", "id"], unique=False)
