"""Who is asked what: the questions, the sides and the one seat for their models, and how answers come and are kept."""
