"""The gateway in the job: `gateway=True`, on this machine."""

import contextlib
import socket
import ssl

import httpx
import openai
import pytest

import mii_hpc as mii
from mii_hpc.deployments import lookup
from tests.waiting import PATIENCE, eventually


def listens(url):
    """Whether anybody takes connections there."""
    try:
        socket.create_connection((httpx.URL(url).host, httpx.URL(url).port), PATIENCE).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.mpi
def test_it_answers_with_the_deployments_certificate_and_ends_with_it(tmp_path):
    client = mii.serve(
        deployment_name="chat",
        home=tmp_path / "home",
        cluster="local",
        inference_engine_config={"engine": "echo"},
        enable_restful_api=True,
    )
    try:
        home = lookup.OwnHome(tmp_path / "home")
        url = eventually(lambda: home.get("chat").entry.gateway)
        found = home.get("chat")
        trust = ssl.create_default_context(cafile=str(home.certificate(found.entry)))
        trust.verify_flags |= ssl.VERIFY_X509_STRICT
        headers = {"authorization": f"Bearer {found.credentials.token}"}
        with httpx.Client(base_url=url, verify=trust, headers=headers, timeout=PATIENCE) as http:
            api = openai.OpenAI(base_url=f"{url}/v1", api_key=found.credentials.token, http_client=http)
            assert api.completions.create(model="chat", prompt="a", max_tokens=2).choices[0].text == "a a "
            assert http.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/health", timeout=PATIENCE)
        place = httpx.URL(url).host, httpx.URL(url).port
        with socket.create_connection(place, PATIENCE) as silent, contextlib.suppress(ConnectionResetError):
            assert silent.recv(1) == b"", "there was no handshake in time"
    finally:
        client.terminate_server()
    eventually(lambda: not listens(url))
