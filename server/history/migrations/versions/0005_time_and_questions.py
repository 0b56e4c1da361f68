"""Simulated seconds of rounds, and which round's question an answer is to.

Revision 0005, after 0004. Earlier rounds took no simulated time, and every answer was to its own round's question.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("rounds", sa.Column("simulated_seconds", sa.Double(), nullable=True))
    op.add_column("participations", sa.Column("asked", sa.Integer(), nullable=True))
    op.add_column("spends", sa.Column("asked", sa.Integer(), nullable=True))
