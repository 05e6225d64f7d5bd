"""The REST service of autobatch: filled by the issue on the service; see the project's README."""
