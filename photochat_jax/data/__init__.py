"""Dialogues, photos and tokenizers: everything between files and batches."""
