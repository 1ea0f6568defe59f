"""Questions of different kinds: what `edge-agent doctor` tries and `scripts/bench` measures where nobody names others.

It is one set, so that what the doctor expects can be compared with what the benchmark measures.
"""

from collections.abc import Mapping

PROBE_TOKENS = 96  # of each answer
FEWEST_TOKENS = 16  # of one that counts: a shorter one has hardly a time per token

TEXTS: Mapping[str, str] = {
    "writing": "Tell me a long story about a lighthouse keeper who finds a message in a bottle.",
    "reasoning": "A farmer has 17 sheep and all but 9 run away. How many are left? Explain step by step.",
    "coding": "Write a Python function that returns the n-th Fibonacci number, and explain how it works.",
    "summarization": (
        "Summarize in three sentences: The first lighthouses were open fires on hilltops. Later the fires were put on"
        " platforms, then on towers, so that ships could see them from afar. In the nineteenth century lenses gathered"
        " the light into beams that reached the horizon. Keepers lived in the towers, trimmed the wicks and wound the"
        " clockworks that turned the lens. Today most lights are electric, switch themselves on at dusk, and nobody"
        " lives there any more."
    ),
    "roleplay": "You are a friendly librarian. A child asks for a book about dinosaurs. What do you say?",
    "math": "What is the sum of the first 50 even numbers? Show how you get there.",
    "translation": "Translate into French: The weather is nice today, so we will walk along the river.",
    "qa": "Why is the sky blue during the day and red in the evening?",
}
