"""The keys of one deployment in Redis: the one place that documents them. scripts/common.lua builds the same names.

All keys begin with the namespace in braces, a hash tag, so that a Redis cluster keeps a deployment in one slot:

    {nibble}:queue                  zset   request ids waiting for a worker; score = arrival, Unix ms, and what its
                                           priority is worth of it, finer by an arrival number (scripts/submit.lua)
    {nibble}:suspects               zset   the same for requests one crash short of quarantine (see common.lua)
    {nibble}:suspect_of             hash   worker -> the suspect it was given last
    {nibble}:leases                 zset   worker -> expiry of its lease, Unix ms of the server's clock
    {nibble}:workers                hash   worker -> WorkerInfo (msgpack)
    {nibble}:worker:<worker>        hash   request id leased to it -> "<attempt>:<gateway>,<gateway>..."
    {nibble}:dropped:<worker>       set    request ids that it must free; told by its next exchange
    {nibble}:wake                   list   one element per wake-up for any idle worker
    {nibble}:wake:<worker>          list   one element per wake-up for this worker
    {nibble}:deadlines              zset   unfinished request ids with a deadline -> Unix ms
    {nibble}:arrivals               string counter behind the queue's scores
    {nibble}:rate                   hash   decayed count of finished requests: the measured service rate
    {nibble}:counters               hash   recovered, fenced, quarantined, expired since the last exchange
    {nibble}:request:<request>      string GenerationRequest (msgpack), immutable
    {nibble}:tokens:<request>       string the token log: uint32 little endian, appended
    {nibble}:logprobs:<request>     string beside it, if asked for: a record of log probabilities for each token
                                           (engine/protocol.py)
    {nibble}:prompt_logprobs:<request>  string records of the prompt's tokens, if asked for
    {nibble}:context:<request>      string beside it: what its gateway needs to make an answer of the tokens
    {nibble}:state:<request>        hash   status (queued, running, finished), attempt, crashes, worker, gateways,
                                           score, submitted_ms, nonce, deadline_ms, max_attempts, log_ttl_ms,
                                           final (TokenEvent); claim and quota (msgpack) if it has them
    {nibble}:claim:<claim>          string "<fingerprint>:<request>" (Terms.claim)
    {nibble}:quota:<name>           hash   "<unit>/<period_ms>" -> Unix ms at which this limit will be unused
                                           (scripts/common.lua); expires then
    {nibble}:response:<id>          hash   record (what a gateway keeps of a finished response, or deleted) and previous
                                           (id of the one that it goes on from, or ''); both live as long as the newest
    {nibble}:events:<gateway>       pub/sub channel (wire.py)

A worker's lease covers all its requests: renewing it is one write, however many they are. `<worker>` is
"<worker_id>#<random>": a restarted process never mistakes its predecessor's requests for its own. A finished request's
keys expire after log_ttl_ms; everything else goes with its owner.
"""

from __future__ import annotations


class Keys:
    """Names of one namespace."""

    def __init__(self, namespace: str) -> None:
        if not namespace or any(character in namespace for character in "{}: "):
            raise ValueError(f"namespace {namespace!r} is empty or has one of '{{}}: '")
        self.root = f"{{{namespace}}}"
        self.queue = f"{self.root}:queue"
        self.suspects = f"{self.root}:suspects"
        self.leases = f"{self.root}:leases"
        self.workers = f"{self.root}:workers"
        self.wake = f"{self.root}:wake"
        self.deadlines = f"{self.root}:deadlines"

    def wake_worker(self, worker: str) -> str:
        return f"{self.wake}:{worker}"

    def worker(self, worker: str) -> str:
        return f"{self.root}:worker:{worker}"

    def dropped(self, worker: str) -> str:
        return f"{self.root}:dropped:{worker}"

    def request(self, request_id: str) -> str:
        return f"{self.root}:request:{request_id}"

    def tokens(self, request_id: str) -> str:
        return f"{self.root}:tokens:{request_id}"

    def logprobs(self, request_id: str) -> str:
        return f"{self.root}:logprobs:{request_id}"

    def prompt_logprobs(self, request_id: str) -> str:
        return f"{self.root}:prompt_logprobs:{request_id}"

    def state(self, request_id: str) -> str:
        return f"{self.root}:state:{request_id}"

    def context(self, request_id: str) -> str:
        return f"{self.root}:context:{request_id}"

    def response(self, response_id: str) -> str:
        return f"{self.root}:response:{response_id}"

    def events(self, gateway_id: str) -> str:
        return f"{self.root}:events:{gateway_id}"
