"""Operations that are worth writing by hand, each with a plain twin in `reference`. No transformers here."""
