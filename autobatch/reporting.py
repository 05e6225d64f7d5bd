"""Send a report to the service, so that schedulers can ask for what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from autobatch.client import ServiceClient
from autobatch.errors import UsageError

if TYPE_CHECKING:
    from autobatch.report import Report

__all__ = ["ReportingService"]


class ReportingService(ServiceClient):
    """The service at one address, as a probe's report goes there; its token needs the scope `probe:write`."""

    def check(self, workload: str) -> None:
        """See, before a probe of minutes, that its report will be taken.

        Args:
            workload: what the service calls the training job, with or without parameters.

        Raises:
            UnavailableError: the service is not there, or does not take the token.
            UsageError: it knows no such workload.
        """
        answer = self.ask("GET", "/v1/workloads")
        known = {
            str(one.get("name")): one.get("parameters") or {}
            for one in answer.get("workloads", [])
            if isinstance(one, dict)
        }
        name, _, query = workload.partition("?")
        if name not in known:
            raise UsageError(
                f"the service at {self.url} knows no workload {name!r}: --report-as takes one of {', '.join(known)}"
            )
        unknown = [key for key, _ in parse_qsl(query, keep_blank_values=True) if key not in known[name]]
        if unknown:
            takes = ", ".join(known[name]) or "none"
            raise UsageError(
                f"the service at {self.url} knows no parameter {unknown[0]!r} of {name}: it takes {takes}; --report-as names "
                "another workload, or writes it with the parameters that it has there"
            )

    def send(self, report: Report, *, workload: str) -> str:
        """Send a report, trying again where what fails may pass.

        Args:
            report: what was found.
            workload: what the service calls the training job.

        Returns:
            The id under which the service keeps it.

        Raises:
            UnavailableError: it was not taken; the message says why.
        """
        return str(self.ask("POST", "/v1/measurements", {"report": report.to_dict(), "workload": workload}).get("id"))
