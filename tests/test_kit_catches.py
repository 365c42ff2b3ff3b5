"""The conformance kit tests others, so here it is tested: right implementations pass, wrong ones fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
FILES = {
    name: file
    for file in (
        HERE / f"wrong_{what}.py" for what in ("accelerators", "backends", "parts", "powers", "streams")
    )
    for name in re.findall(r"^class Test(\w+)", file.read_text(), re.MULTILINE)
}

CAUGHT_BY = {
    "AddsToTheOutput": "ffn_is_the_sum_over_its_neurons",
    "AddsToWhatIsThere": "a_ticket_gives_the_sum_over_the_first_neurons",
    "AnswersATicketThatWasGivenUp": "a_ticket_that_is_given_up_leaves_nothing_behind",
    "AnswersBeforeItHasRead": "reads_in_flight_end_as_plain_reads_do",
    "ChangesItsInput": "ffn_is_the_sum_over_its_neurons",
    "ClaimsTooCoarseATolerance": "its_tolerance_is_positive_and_finer_than_eight_bits",
    "ComputesBeforeTheBytesAreThere": "a_stream_gives_the_bits_of_a_full_slab",
    "CountsBytesThatItDidNotRead": "a_settled_prefetch_is_there_or_is_not",
    "CountsEveryNeuron": "ffn_is_the_sum_over_its_neurons",
    "CountsNeuronsThatItHadToRead": "a_stream_gives_the_bits_of_a_full_slab",
    "DecodesASlabOnce": "a_slab_may_change_between_calls",
    "DropsTheBias": "ffn_is_the_sum_over_its_neurons",
    "FindsTheNeighboursSlot": "slots_are_found_and_given_out_as_numpy_does",
    "ForgetsByBeingAsked": "victims_are_always_residents",
    "ForgetsTheBiasOfAPredictor": "a_low_rank_predictor_names_what_two_products_name",
    "ForgetsTheReluOfUp": "ffn_is_the_sum_over_its_neurons",
    "ForgetsTheResidualConnection": "attention_is_the_block_of_its_formula",
    "ForgetsTheWindow": "attention_is_the_block_of_its_formula",
    "ForgetsWhatItIsToDoMeanwhile": "something_else_is_done_meanwhile",
    "ForgetsWhatWasGuessed": "victims_are_always_residents",
    "ForgetsWhoseTheSlotIs": "slots_are_found_and_given_out_as_numpy_does",
    "GivesASlotThatIsNotEmpty": "slots_are_found_and_given_out_as_numpy_does",
    "GivesWritableViews": "a_view_agrees_with_a_read_and_cannot_be_written",
    "IgnoresRowsOfFfn": "any_partition_into_clusters_adds_up_to_the_dense_ffn",
    "IgnoresRowsOfLinear": "linear_is_the_matrix_product_of_the_exact_weights",
    "IsLessExactThanItSays": "linear_is_the_matrix_product_of_the_exact_weights",
    "IsNotDeterministic": "linear_is_the_matrix_product_of_the_exact_weights",
    "KeepsKeysInThirtyTwoBits": "victims_are_always_residents",
    "LeavesAnElementUnwritten": "linear_is_the_matrix_product_of_the_exact_weights",
    "LeavesReadsBehind": "a_stream_may_be_closed_while_it_reads",
    "MissesANeuron": "if_lossless_it_misses_no_active_neuron",
    "MistakesOneGeluForTheOther": "ffn_is_the_sum_over_its_neurons",
    "NamesNeuronsOutOfOrder": "it_names_neurons_in_order_and_the_same_ones_again",
    "NamesNeuronsThatAreNotThere": "an_input_beyond_reason_does_no_harm",
    "NamesNoFile": "a_missing_file_is_refused_by_name",
    "NamesNonResidents": "victims_are_always_residents",
    "NamesNothingThatIsNoNumber": "a_low_rank_predictor_names_what_two_products_name",
    "NamesTooFewVictims": "victims_are_always_residents",
    "NamesWhatOnlyReachesItsBound": "a_low_rank_predictor_names_what_two_products_name",
    "RaisesInProbe": "its_probe_gives_a_score_and_a_reason_and_repeats_itself",
    "ReadsInOrderOfOffset": "it_reads_what_was_written_in_the_order_asked",
    "ReadsShort": "a_read_past_the_end_is_refused_whole",
    "ReadsWholePages": "it_reads_what_was_written_in_the_order_asked",
    "ReleasesAllHandles": "handles_are_independent_and_released_in_any_order",
    "SharesOnePosition": "reads_from_several_threads_do_not_disturb_each_other",
    "SpreadsNan": "ffn_keeps_what_is_not_finite_in_its_row",
    "StartsEveryCallAtPositionZero": "attention_may_be_fed_in_pieces",
    "SumsInAnOrderThatDependsOnTheRows": "neurons_that_are_zero_change_no_bit",
    "SwallowsNan": "ffn_keeps_what_is_not_finite_in_its_row",
    "SwapsTheNibbles": "linear_is_the_matrix_product_of_the_exact_weights",
    "TakesAGateForAWholeNeuron": "a_stream_gives_the_bits_of_a_full_slab",
    "TakesNeuronsForSlots": "a_slab_gives_the_bits_of_the_ffn",
    "TakesOneNeuronTooMany": "a_ticket_gives_the_sum_over_the_first_neurons",
    "TracesUnasked": "spans_tell_what_was_done",
    "UsesWhatItCouldNotRead": "a_failed_read_ends_the_call_and_nothing_else",
    "WritesAfterACancel": "reads_in_flight_end_as_plain_reads_do",
    "WritesBehindTheOutput": "linear_is_the_matrix_product_of_the_exact_weights",
    "WritesBehindTheTokens": "attention_is_the_block_of_its_formula",
}
RIGHT = ("Asked", "Attending", "OneByOne", "Plain", "PlainPredictor", "Searching", "SlowTwin")


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, set[str]]:
    """Class -> its tests that failed, without the words Test and test_, from one run of pytest."""
    where = tmp_path_factory.mktemp("kit")
    report = where / "report.xml"
    chosen = [f"{FILES[name]}::Test{name}::test_{test}" for name, test in CAUGHT_BY.items()]
    chosen += [f"{FILES[name]}::Test{name}" for name in RIGHT]
    options = ["-q", "--tb=line", "--import-mode=importlib", "-c", os.devnull, f"--rootdir={where}"]
    options += ["-o", f"pythonpath={HERE}", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *options, *chosen]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert report.exists(), done.stdout + done.stderr
    found: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        tests = found.setdefault(case.get("classname", "").rpartition(".Test")[2], set())
        if case.find("failure") is not None or case.find("error") is not None:
            tests.add(case.get("name", "").removeprefix("test_").partition("[")[0])
    return found


@pytest.mark.parametrize("mistake", CAUGHT_BY)
def test_a_wrong_implementation_is_caught(failures, mistake):
    assert CAUGHT_BY[mistake] in failures[mistake]


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_implementation_passes(failures, name):
    assert failures[name] == set()


def test_every_implementation_of_the_files_is_listed_here():
    assert sorted(CAUGHT_BY) == list(CAUGHT_BY)
    assert set(FILES) == set(CAUGHT_BY) | set(RIGHT)
