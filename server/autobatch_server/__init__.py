"""The REST service that job schedulers query: `autobatch serve`, or `python -m autobatch_server`."""

__all__: list[str] = []
