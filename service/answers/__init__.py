"""From pixels to answers: what is asked, the engine and its queue, labels, candidates."""
