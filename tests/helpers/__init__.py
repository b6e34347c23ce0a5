"""What tests of ops share: an oracle, the rule by which results pass, cases and whole checks."""
