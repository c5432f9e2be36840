"""What gpt_elo_eval.py rests on: tasks, prompts and client of the judge, the store of judgments, ratings, report."""
