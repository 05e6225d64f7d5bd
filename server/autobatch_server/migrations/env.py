"""Run by Alembic: migrates over the connection that `open_database` hands it."""

from alembic import context

from autobatch_server.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
