"""Migrations of the service's own tables, run by Alembic."""
