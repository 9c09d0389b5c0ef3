"""The sentences by which LLaVA and Bunny ask for short answers, and for one of several options."""

ONE_PHRASE = "Answer the question using a single word or phrase."
ONE_LETTER = "Answer with the option's letter from the given choices directly."
