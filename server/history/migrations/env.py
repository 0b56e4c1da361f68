"""Run the migrations on the connection, and in the transaction, that `server.history.schema` opened.

Alembic runs this file; nothing imports it. All revisions of an upgrade are one transaction, on SQLite
too, so an upgrade that fails changes nothing.
"""

from alembic import context

from server.history.models import Base
from server.history.schema import TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=TABLE,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
