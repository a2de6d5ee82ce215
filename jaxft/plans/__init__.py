"""What a run takes of the chips it would run on: memory, work, what travels, time and money."""
