"""What tools/inspect_data.py shows of prepared data: documents as text, their lengths, tokens and scripts."""
