"""What people and shells see: progress, tables, and the forms that other programs read."""
