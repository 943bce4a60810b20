#!/usr/bin/env python3
"""The facts of docs/dependencies.md: version, `unsafe` and lines of each crate that is named there, and the size of the tree."""

import json,subprocess,re,os,collections
m=json.loads(subprocess.check_output(['cargo','metadata','--offline','--format-version','1','--locked']))
pk={p['id']:p for p in m['packages']}
nodes={n['id']:n for n in m['resolve']['nodes']}
root=m['resolve']['root']
# normal deps closure
def normal(i):
    return [d['pkg'] for d in nodes[i]['deps'] if any(k['kind'] is None for k in d['dep_kinds'])]
seen=set();st=[root]
while st:
    x=st.pop()
    if x in seen: continue
    seen.add(x); st+=normal(x)
print('normal closure',len(seen)-1,'lock',len(m['packages']))
def unsafe(p):
    d=os.path.join(os.path.dirname(p['manifest_path']),'src'); n=0; loc=0; forbid=False
    for r,_,fs in os.walk(d):
        for f in fs:
            if f.endswith('.rs'):
                t=open(os.path.join(r,f),errors='replace').read()
                loc+=t.count('\n')
                if re.search(r'#!\[(cfg_attr\([^\]]*,\s*)?(forbid|deny)\(unsafe_code',t): forbid=True
                t=re.sub(r'//[^\n]*','',t)
                n+=len(re.findall(r'\bunsafe\s*(\{|impl\b|fn\b|extern\b)',t))
    return n,loc,forbid
names='pingora-core pingora-proxy pingora-http h2 http httparse bytes tokio tokio-util mio socket2 rustls ring tokio-rustls rustls-webpki rustls-pki-types hyper hyper-util tokio-postgres postgres-protocol deadpool deadpool-postgres redis rusqlite libsqlite3-sys arc-swap parking_lot parking_lot_core moka crossbeam-epoch indexmap hashbrown sha2 memchr aho-corasick smallvec foldhash siphasher fastrand getrandom percent-encoding base64 serde serde_json prometheus log mimalloc libmimalloc-sys nix rustix ipnet humantime time async-trait futures-util once_cell pingora-pool pingora-cache pingora-timeout pingora-error lru thread_local flate2 brotli zstd zstd-safe libz-ng-sys tokio-postgres-rustls toml toml_edit zeroize x509-cert rcgen listenfd bytes slab fnv httpdate'.split()
for n in names:
    for i in sorted(seen):
        p=pk[i]
        if p['name']==n:
            u,l,f=unsafe(p)
            print(n,p['version'],'unsafe',u,'forbid' if f else '','loc',l,'|',(p['authors'] or [''])[0][:40],'|',p['repository'],'|',p['license'])
