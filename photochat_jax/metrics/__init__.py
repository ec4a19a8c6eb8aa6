"""What is measured, apart from the models that are measured.

`text` (perplexity), `words` (BLEU, ROUGE-L, Distinct), `intent` (is a photo
shared at this turn?), `image` (does the drawn photo, or the answer about a
photo, hold what it should?), `inception` (FID, Inception Score), `similarity`
(CLIP score, MM-Relevance), `figures` (what is known of each) and `report` (one
self-contained HTML page). Everything here is a pure function of
numbers, strings and arrays: no model, no tokenizer, no data reader.
"""
