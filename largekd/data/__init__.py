"""Records, chat templates, tokenization, packing, collation and the row loader."""
