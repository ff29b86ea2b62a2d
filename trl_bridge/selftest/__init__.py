"""
`trl-bridge selftest`: small runs of each method on the user's machine, compared with the updates in float64.

`reference/` has the updates in plain autograd, without trainers; the files beside it record runs and replay them; the tests use both.
"""
