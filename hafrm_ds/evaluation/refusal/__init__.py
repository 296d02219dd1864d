"""What a model refuses, by either head, and how a defence moves it: shift against discrimination."""
