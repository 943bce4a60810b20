-- Shared limits. One transaction. {schema} is their schema.
SELECT pg_catalog.pg_advisory_xact_lock(7811887447316);
DO $make$ BEGIN
    -- IF NOT EXISTS would need the right to make one also where it is there.
    IF pg_catalog.to_regnamespace('{schema}') IS NULL THEN CREATE SCHEMA {schema}; END IF;
END $make$;
-- Unlogged: a crash of the server forgets them, as a restart of Redis does. Room in each page keeps updates within it.
CREATE UNLOGGED TABLE IF NOT EXISTS {schema}.shared_limit (
    key text PRIMARY KEY,
    debt bigint NOT NULL DEFAULT 0,
    seen bigint NOT NULL DEFAULT 0,
    spent bigint NOT NULL DEFAULT 0,
    period bigint NOT NULL DEFAULT 0,
    -- Of each replica: what it holds, and until when, in microseconds.
    leases jsonb NOT NULL DEFAULT '{}',
    -- As good as new from then on.
    idle_at bigint NOT NULL DEFAULT 9223372036854775807
) WITH (fillfactor = 50);
CREATE UNLOGGED TABLE IF NOT EXISTS {schema}.shared_limit_replica (
    replica text PRIMARY KEY,
    seen bigint NOT NULL
);
CREATE OR REPLACE FUNCTION {schema}.shared_limit_lease_1(ttl bigint, me text, keys text[], numbers bigint[])
RETURNS SETOF bigint[] LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $lease$
#variable_conflict use_variable
DECLARE
    flow bigint; unit bigint; burst bigint; quota bigint; monthly bigint;
    used bigint; keeps bigint; cost bigint; count bigint; ahead bigint;
    bucket {schema}.shared_limit%ROWTYPE;
    now bigint; debt bigint; spent bigint; current bigint; own bigint; others bigint; last bigint;
    told bigint; room bigint; passed bigint; got bigint; rest bigint; wait bigint; by_quota bigint; longer bigint; keep bigint;
    moment timestamp; held jsonb; one record;
BEGIN
    FOR i IN 1 .. coalesce(array_length(keys, 1), 0) LOOP
        flow := numbers[i * 10 - 9]; unit := numbers[i * 10 - 8]; burst := numbers[i * 10 - 7];
        quota := numbers[i * 10 - 6]; monthly := numbers[i * 10 - 5];
        used := numbers[i * 10 - 4]; keeps := numbers[i * 10 - 3];
        cost := numbers[i * 10 - 2]; count := numbers[i * 10 - 1]; ahead := numbers[i * 10];
        INSERT INTO {schema}.shared_limit AS known (key) VALUES (keys[i])
            ON CONFLICT (key) DO UPDATE SET key = EXCLUDED.key RETURNING known.* INTO bucket;
        -- Read with the row locked: it never goes back from one replica to the next.
        moment := timezone('UTC', clock_timestamp());
        now := (extract(epoch FROM moment) * 1000000)::bigint;
        debt := greatest(0, bucket.debt - least(greatest(0, now - bucket.seen)::numeric * flow, 9000000000000000000)::bigint);
        IF monthly > 0 THEN
            current := extract(year FROM moment)::bigint * 12 + extract(month FROM moment)::bigint - 1;
            rest := (extract(epoch FROM date_trunc('month', moment) + interval '1 month' - moment) * 1000000)::bigint;
        ELSE
            current := now / 86400000000;
            rest := (current + 1) * 86400000000 - now;
        END IF;
        spent := bucket.spent;
        -- A clock that was set back by a little must not give the quota anew.
        IF bucket.period <> current AND bucket.period <> current + 1 THEN
            spent := 0;
            bucket.period := current;
        END IF;
        own := 0; others := 0; last := 0; held := '{}';
        FOR one IN SELECT entry.key AS replica, (entry.value ->> 0)::bigint AS units, (entry.value ->> 1)::bigint AS ends
            FROM jsonb_each(bucket.leases) entry
        LOOP
            IF one.ends <= now THEN
                -- It may have been used, and nobody says so any more.
                debt := debt + one.units * unit;
                spent := spent + one.units;
            ELSIF one.replica = me THEN
                own := one.units;
            ELSE
                others := others + one.units;
                last := greatest(last, one.ends);
                held := held || jsonb_build_object(one.replica, jsonb_build_array(one.units, one.ends));
            END IF;
        END LOOP;
        told := least(used, own);
        debt := debt + told * unit; spent := spent + told; own := own - told;
        IF keeps >= 0 THEN own := keeps; END IF;
        room := 9223372036854775807;
        IF burst > 0 THEN room := least(room, floor((burst * unit - debt)::numeric / unit)::bigint - others - own); END IF;
        IF quota > 0 THEN room := least(room, quota - spent - others - own); END IF;
        room := greatest(0, room);
        passed := 0;
        IF cost > 0 THEN passed := least(count, room / cost); END IF;
        debt := debt + passed * cost * unit; spent := spent + passed * cost; room := room - passed * cost;
        got := 0;
        IF passed = count THEN got := least(ahead, room); END IF;
        own := own + got;
        wait := 0; by_quota := 0;
        IF passed < count THEN
            IF burst > 0 THEN
                wait := greatest(0, ceil((debt + (others + own + cost) * unit - burst * unit)::numeric / flow)::bigint);
            END IF;
            IF quota > 0 AND quota - spent - others - own < cost THEN
                -- Others may give back what they hold.
                longer := CASE WHEN quota - spent >= cost THEN ttl ELSE rest END;
                IF longer > wait THEN wait := longer; by_quota := 1; END IF;
            END IF;
            wait := greatest(1, wait);
        END IF;
        IF own > 0 THEN
            held := held || jsonb_build_object(me, jsonb_build_array(own, now + ttl));
            last := greatest(last, now + ttl);
        END IF;
        keep := 0;
        IF burst > 0 THEN keep := ceil((debt + (others + own) * unit)::numeric / flow)::bigint; END IF;
        IF others + own > 0 THEN keep := keep + greatest(0, last - now); END IF;
        IF quota > 0 AND spent + others + own > 0 THEN keep := greatest(keep, rest); END IF;
        UPDATE {schema}.shared_limit
            SET debt = debt, seen = now, spent = spent, period = bucket.period, leases = held, idle_at = now + keep
            WHERE key = keys[i];
        RETURN NEXT ARRAY[passed, got, wait, by_quota,
            CASE WHEN burst > 0
                THEN greatest(0, floor((burst * unit - debt)::numeric / unit)::bigint - others - own) ELSE 0 END,
            CASE WHEN quota > 0 THEN greatest(0, quota - spent - others - own) ELSE 0 END];
    END LOOP;
END
$lease$;
CREATE OR REPLACE FUNCTION {schema}.shared_limit_beat_1(lasts bigint, me text)
RETURNS bigint LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $beat$
#variable_conflict use_variable
DECLARE
    now bigint := (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;
BEGIN
    INSERT INTO {schema}.shared_limit_replica AS known (replica, seen) VALUES (me, now)
        ON CONFLICT (replica) DO UPDATE SET seen = EXCLUDED.seen;
    DELETE FROM {schema}.shared_limit_replica WHERE replica IN (
        SELECT replica FROM {schema}.shared_limit_replica WHERE seen < now - lasts FOR UPDATE SKIP LOCKED);
    -- Not all at once, and none that somebody uses.
    DELETE FROM {schema}.shared_limit WHERE key IN (
        SELECT key FROM {schema}.shared_limit WHERE idle_at < now - 1000000 LIMIT 10000 FOR UPDATE SKIP LOCKED);
    RETURN (SELECT count(*) FROM {schema}.shared_limit_replica WHERE seen >= now - lasts);
END
$beat$;
