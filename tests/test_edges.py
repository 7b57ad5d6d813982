"""A part of the calls at the edges: no exception escapes, none takes long."""

from conftest import process


def test_no_call_at_the_edges_ends_in_a_traceback(tmp_path):
    done = process("-m", "benchmarks.edges", "--share", 83)  # prime: every kind of call is among them
    assert done.returncode == 0 and ", 0 faults" in done.stdout, done.stdout + done.stderr
    assert int(done.stdout.split()[-4]) > 40
