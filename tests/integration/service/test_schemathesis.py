"""wip"""
import time
from collections import Counter
from pathlib import Path
import schemathesis
from schemathesis import config as c
from schemathesis.engine import from_schema, events
from service.app import create_app
from service.settings import Settings
from tests.integration.service.test_storm import listening

def test_x(checkpoint: Path) -> None:
    app = create_app(Settings(max_tokens=8, max_samples=2), {"tiny": str(checkpoint)})
    with listening(app) as port:
        import os
        gen = c.GenerationConfig(max_examples=int(os.environ.get("MAXEX","10")), deterministic=True, no_shrink=True)
        phases = c.PhasesConfig(
            examples=c.ExamplesPhaseConfig(enabled=True),
            coverage=c.CoveragePhaseConfig(enabled=True),
            fuzzing=c.FuzzingPhaseConfig(enabled=True),
            stateful=c.StatefulPhaseConfig(enabled=False),
        )
        project = c.ProjectConfig(generation=gen, phases=phases, request_timeout=20.0, workers=1,continue_on_failure=True)
        conf = c.SchemathesisConfig(seed=1, projects=c.ProjectsConfig(default=project))
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json", config=conf)
        n, status = 0, Counter()
        started = time.time()
        seen = {}
        for event in from_schema(schema).execute():
            if isinstance(event, events.ScenarioFinished):
                for cid, inter in event.recorder.interactions.items():
                    status[event.phase.value, event.recorder.label, inter.response.status_code if inter.response else None] += 1
                for cid, checks in event.recorder.checks.items():
                    for check in checks:
                        if check.failure_info is not None:
                            f = check.failure_info.failure
                            key = (event.recorder.label, check.name, f.title, event.phase.value)
                            if key not in seen:
                                seen[key] = 0
                                print("=====", key); print(f.message[:600]); print(check.failure_info.code_sample[:600])
                                r = event.recorder.interactions[cid].response
                                print(r and (r.status_code, r.content[:300]))
                            seen[key] += 1
            elif "Error" in type(event).__name__:
                print("#### ERROR", event)
            elif isinstance(event, events.PhaseFinished):
                print("phase", event.phase.name, event.status, time.time() - started)
        for k, v in sorted(status.items(), key=str): print(k, v)
        for k, v in seen.items(): print(k, v)
        assert 0
