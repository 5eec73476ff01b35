"""Data: corpora to token files (text, pydocs, tokenizer) and the downloads they need (download)."""
