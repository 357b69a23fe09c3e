"""The rows of the scorecard: each module holds one row, or what several share."""
