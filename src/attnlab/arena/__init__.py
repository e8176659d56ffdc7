"""Tasks, training, measures, results and reports: mechanisms compared on equal terms. May import models and what lies below."""
