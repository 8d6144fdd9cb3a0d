"""The parts of report.html, each a pure function of a run's files (scores, rows, facts), and how pages are made."""
