"""Signals that ask a process to stop."""

import os
import signal
import threading
import time

import pytest

from gpt_jax.runtime.signals import StopSignals, stop_requested

NUMBERS = (signal.SIGTERM, signal.SIGINT)


def handlers():
    return [signal.getsignal(number) for number in NUMBERS]


def test_signals_are_counted_and_do_not_end_the_process():
    with StopSignals() as stop:
        assert stop.count == 0
        for count, number in enumerate((signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM), 1):
            os.kill(os.getpid(), number)
            assert stop.count == count


def test_the_previous_handlers_are_put_back_even_after_an_error():
    def own(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, own)
    try:
        previous = handlers()
        with StopSignals():
            assert not set(handlers()) & set(previous)
        assert handlers() == previous
        with pytest.raises(ValueError, match="inside"), StopSignals():
            raise ValueError("inside")
        assert handlers() == previous
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_second_ctrl_c_can_be_left_to_stop_at_once(number):
    before = handlers()
    with StopSignals(second_interrupt_kills=True) as stop:
        os.kill(os.getpid(), number)
        assert stop.count == 1
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the signal is noticed between two statements
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        os.kill(os.getpid(), signal.SIGTERM)  # A scheduler's second SIGTERM is only counted.
        assert stop.count == 2
    assert handlers() == before


def test_outside_the_main_thread_signals_are_left_alone():
    before, during = handlers(), []

    def body():
        with StopSignals() as stop:
            during.append((stop.count, handlers()))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert during == [(0, before)]
    assert handlers() == before


def test_other_code_can_ask_whether_a_stop_was_requested():
    assert not stop_requested()
    with StopSignals():
        assert not stop_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested()
        with StopSignals():
            assert stop_requested()
        assert stop_requested()
    assert not stop_requested()
