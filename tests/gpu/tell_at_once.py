"""A plugin of pytest that prints a failure when it happens: a run that is cut short never comes to its summary."""

import pytest


@pytest.hookimpl
def pytest_configure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")

    class TellAtOnce:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                reporter.ensure_newline()
                reporter.write_line(report.longreprtext)

    config.pluginmanager.register(TellAtOnce())
