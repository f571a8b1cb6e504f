"""Evaluations of a trained model: perplexity, context, retrieval, summaries, tasks of lm-evaluation-harness."""
