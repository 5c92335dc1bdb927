"""Files from outside the project: what they contain, how they are opened, and how a defect in one is reported."""
