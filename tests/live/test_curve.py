"""CURVE: who has no certificate in the server's folder is not heard."""

import socket

import pytest
import zmq.auth
from live_fakes import wait_for

from kvcore.live.client import Client, CurveKeys, ServerAwayError


def keys(server_public, secret_file):
    public, secret = zmq.auth.load_certificate(secret_file)
    server, _ = zmq.auth.load_certificate(server_public)
    return CurveKeys(server=server.decode(), public=public.decode(), secret=secret.decode())


def test_only_clients_with_a_certificate_are_served(start, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    clients, strangers = folder / "clients", folder / "strangers"
    clients.mkdir()
    strangers.mkdir()
    server_public, server_secret = zmq.auth.create_certificates(folder, "server")
    _, known = zmq.auth.create_certificates(clients, "known")
    _, stranger = zmq.auth.create_certificates(strangers, "stranger")
    server = start("--bind", endpoint, "--curve-key", server_secret, "--curve-clients", str(clients))
    with Client(endpoint, keys(server_public, known)) as client:
        assert client.ping(5).pid == server.process.pid
    for curve in (None, keys(server_public, stranger)):
        with Client(endpoint, curve) as client, pytest.raises(ServerAwayError):
            client.ping(0.5)
    wait_for(lambda: server.status()["pid"] == server.process.pid)  # the local endpoint needs none
