# SPDX-License-Identifier: Apache-2.0
"""Variables with our prefix that name no setting."""

from dataclasses import fields

import pytest

from imageserver.settings import PREFIX, InvalidSetting, Settings, variable_of


@pytest.mark.parametrize(
    "variable",
    [
        pytest.param("IMAGESERVER_NO_SUCH", id="unknown"),
        pytest.param("IMAGESERVER_", id="prefix-alone"),
        pytest.param("IMAGESERVER_FROM_ENVIRON", id="attribute-of-the-class"),
    ],
)
def test_an_unknown_variable_is_refused_with_those_there_are(variable: str) -> None:
    with pytest.raises(InvalidSetting) as failure:
        Settings.from_environ({variable: "1"})

    known = ", ".join(variable_of(field.name) for field in fields(Settings))
    assert str(failure.value) == f"{variable} is not a setting; known are {known}."


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("IMAGESERVER_MAX_READER", "MAX_READERS"),
        ("IMAGESERVER_READERS", "MAX_READERS"),
        ("IMAGESERVER_workers", "WORKERS"),
        ("IMAGESERVER_CONFIG_DIRECTORY", "CONFIG_DIR"),
    ],
)
def test_an_unknown_variable_that_is_close_to_one_is_refused_with_that(
    variable: str, meant: str
) -> None:
    with pytest.raises(InvalidSetting) as failure:
        Settings.from_environ({variable: "1"})

    said = f"{variable} is not a setting; did you mean IMAGESERVER_{meant}?"
    assert str(failure.value) == said


def test_what_a_pod_is_told_of_a_service_with_our_name_is_none_of_our_business() -> None:
    service = {
        "SERVICE_HOST": "10.0.0.11",
        "SERVICE_PORT": "54322",
        "SERVICE_PORT_HTTP": "54322",
        "PORT": "tcp://10.0.0.11:54322",
        "PORT_54322_TCP": "tcp://10.0.0.11:54322",
        "PORT_54322_TCP_PROTO": "tcp",
        "PORT_54322_TCP_PORT": "54322",
        "PORT_54322_TCP_ADDR": "10.0.0.11",
    }

    told = {PREFIX + name: text for name, text in service.items()}
    assert Settings.from_environ(told) == Settings()


@pytest.mark.parametrize("name", ["PORT", "SERVICE", "PORT_TCP", "SERVICE_PORTS"])
def test_what_only_looks_like_a_service_is_refused(name: str) -> None:
    with pytest.raises(InvalidSetting, match="is not a setting"):
        Settings.from_environ({PREFIX + name: "54322"})


def test_other_variables_are_none_of_our_business() -> None:
    environ = {"PATH": "x", "IMAGESERVERS": "1", "imageserver_workers": "0", "X_IMAGESERVER_Y": "1"}
    environ |= {"IMAGESERVER_TEST_QCOW2": "/x", "IMAGESERVER_STRESS_TEST_QCOW_DIR": "/y"}

    assert Settings.from_environ(environ) == Settings()
