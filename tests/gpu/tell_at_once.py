"""A plugin of pytest that prints a failure when it happens: a run that is cut short never comes to its summary."""

import pytest


@pytest.hookimpl(trylast=True)  # after pytest's own, which makes the reporter
def pytest_configure(config: pytest.Config) -> None:
    plugins = config.pluginmanager.get_plugins()
    (reporter,) = (each for each in plugins if isinstance(each, pytest.TerminalReporter))

    class TellAtOnce:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                reporter.ensure_newline()
                reporter.write_line(report.longreprtext)

    config.pluginmanager.register(TellAtOnce())
