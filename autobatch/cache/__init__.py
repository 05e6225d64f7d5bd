"""What earlier probes of this user measured, kept on disk, and what of it answers a new one."""
