"""report.html: its parts, each a pure function of a run's files (scores, rows, facts), the figures in them, how pages
are made, and `report`, which writes it."""
