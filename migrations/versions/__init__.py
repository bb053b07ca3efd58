"""One file per revision, expand → migrate → contract: each can run under the release before it."""
