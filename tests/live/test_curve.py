"""CURVE: who has no certificate in the server's folder is not heard."""

import socket
from contextlib import ExitStack

import pytest
import zmq.auth
from live_fakes import wait_for

from kvcore.live.client import Client, CurveKeys, ServerAwayError
from kvcore.live.server import Server, StartError
from kvcore.live.settings import Settings


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


def free_endpoints(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"tcp://127.0.0.1:{one.getsockname()[1]}" for one in sockets]


def test_every_endpoint_admits_the_same_clients(start, folder):
    endpoints, clients = free_endpoints(2), folder / "clients"
    clients.mkdir()
    server_public, server_secret = zmq.auth.create_certificates(folder, "server")
    _, known = zmq.auth.create_certificates(clients, "known")
    bind = [part for endpoint in endpoints for part in ("--bind", endpoint)]
    server = start(*bind, "--curve-key", server_secret, "--curve-clients", str(clients))
    for endpoint in endpoints:
        with Client(endpoint, keys(server_public, known)) as client:
            assert client.ping(5).pid == server.process.pid
        with Client(endpoint) as client, pytest.raises(ServerAwayError):
            client.ping(0.5)
    assert server.stop() == 0


def test_a_folder_of_certificates_that_is_not_there_is_a_start_error(folder):
    _, secret = zmq.auth.create_certificates(folder, "server")
    for clients in ("", str(folder / "nowhere")):
        settings = Settings(
            bind=tuple(free_endpoints(1)), arena_dir=str(folder), http="off", curve_key=secret, curve_clients=clients
        )
        with pytest.raises(StartError, match=r"--curve-clients .*no such folder"):
            Server(settings).open()
