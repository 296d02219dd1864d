import pytest

from hafrm_ds.data.portions import portion_range


@pytest.mark.parametrize(
    ("portion", "total", "expected"),
    [
        (":5%", 20490, range(0, 1024)),
        ("5%:", 20490, range(1024, 20490)),
        (":10%", 9691, range(0, 969)),
        ("10%:", 9691, range(969, 9691)),
        ("5%:50%", 1000, range(50, 500)),
        (":29%", 100, range(0, 29)),
        (":12.5%", 16, range(0, 2)),
        (":1000", 3000, range(0, 1000)),
        (":1000", 30, range(0, 30)),
        ("10:50%", 40, range(10, 20)),
        ("2:7", 40, range(2, 7)),
    ],
)
def test_portion_range(portion, total, expected):
    assert portion_range(portion, total) == expected
